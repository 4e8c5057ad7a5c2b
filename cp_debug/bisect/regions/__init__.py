"""Inside what an engine fuses: which of a region's many nodes is at fault."""
