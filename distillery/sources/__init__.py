"""Where encoded images come from, in a fixed order, and how their bytes become pixels."""
