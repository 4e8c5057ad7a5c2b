"""What a Python program calls: every kind of model in one calling shape. The root of the package exports it flat."""
