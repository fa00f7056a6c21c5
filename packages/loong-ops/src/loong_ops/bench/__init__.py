"""What `loong bench ops` measures: a module per op, with a function `rows`. Importing one allocates nothing."""
