data_dir = "/run/deputy/public"
