"""Begin a project: the recipes of the package, and a starter project."""
