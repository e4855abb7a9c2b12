"""MinPRO and eight other objectives under delays of 0, 4 and 16 global steps, with seeds enough to separate them."""
