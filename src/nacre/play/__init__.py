"""A page to look at what nacre made: models by depth, compositions, substrates, runs, studies.

`nacre play` serves it to this machine alone. Each tab is a module of pure functions, data in, HTML
out; `app` wires them to Gradio, `guard` decides which requests are answered.
"""
