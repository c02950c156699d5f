"""Sources of encoded images, in a fixed order, and the decoder from their bytes to pixels."""
