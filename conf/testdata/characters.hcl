trust_domain = 'example.org'
data_dir = "/x";
