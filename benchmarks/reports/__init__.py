"""Public reports of numerical divergence, rebuilt small, each with a healthy twin: ``run.py`` tells how."""
