"""The commands of `lrc`: a file a command."""
