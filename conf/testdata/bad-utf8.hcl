trust_domain = "exÿample.org"
