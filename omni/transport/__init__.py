"""How one payload crosses one edge: handed over in one process, or through Ray's object store."""
