"""What a precision will do to a network, before there is an engine."""
