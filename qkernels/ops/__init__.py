"""The public ops: schema, check, fake kernel, autograd function and docstring, one file each."""
