"""Special cases of pipeline families: one module each, for what no rule of `signature.py` or `outputs.py` can tell."""
