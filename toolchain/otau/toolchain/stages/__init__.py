"""The stages of a compilation, a module each; `pipeline.py` lists them in their order."""
