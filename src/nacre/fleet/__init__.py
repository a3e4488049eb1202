"""Independent jobs on the machines of a Ray cluster: experts, studies, tokenizers, evaluations.

`design` is a fleet as data, `jobs` what its commands mean, `runner` runs them, `cluster` is what
knows Ray. Name the modules: what looks after a job on some machine imports no torch.
"""
