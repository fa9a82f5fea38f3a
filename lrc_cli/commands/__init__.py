"""The commands of `lrc`: a file a command, with its options, its body and its text."""
