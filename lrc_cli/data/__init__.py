"""What data files hold, as positions that blocks of model inputs are taken from."""
