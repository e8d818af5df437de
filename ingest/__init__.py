"""What comes in: sources, units, reduction, encoding, captions, and the pipeline that joins them."""
