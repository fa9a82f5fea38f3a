"""Tables of hostile inputs, and the room in which each case is tried in this process."""
