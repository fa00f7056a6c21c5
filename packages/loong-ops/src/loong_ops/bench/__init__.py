"""What `loong bench ops` measures: a module per op or family of ops, with a function `rows`. Nothing is allocated here."""
