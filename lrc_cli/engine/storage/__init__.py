"""Each file here packs a layer into one form of storage, or chooses between forms."""
