delegated_identity {
  authorized_delegates = []
}
