data_dir = "/run/deputy/public/../public/data"
admin_socket {
  path = "/run/deputy/public/admin/admin.sock"
}
