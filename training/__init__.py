"""qserve-train: makes the artifacts that qserve serves. Of qserve it knows checkpoint, quant and errors alone."""
