"""The controls of every tab and their events; what they show is made by `nacre.play.<tab>`.

Nothing slow is imported here: an event imports what it needs when it first happens.
"""
