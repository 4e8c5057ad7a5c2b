"""A plug-in for cpdebug: a recipe, a backend and a reader of deploy files."""
