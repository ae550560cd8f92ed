"""Small trainers that produce real adapters of each method, in the layout its authors chose. Extra `train`.

Must not know: serving. Nothing outside this package and the command line imports it.
"""
