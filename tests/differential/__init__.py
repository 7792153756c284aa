"""Native codecs against their slow twins, over inputs that nobody wrote by hand."""
