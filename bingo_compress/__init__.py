"""bingo-compress: distil any timm model into any smaller one on a plain folder of images, without labels."""

__version__ = "0.1.0"
