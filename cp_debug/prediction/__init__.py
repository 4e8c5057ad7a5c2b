"""Prediction of the effects of a precision on a network, before there is an engine."""
