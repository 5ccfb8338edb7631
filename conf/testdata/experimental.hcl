experimental {
  wit_svid = "yes"
  wat_svid = true
}
experimental { wit_svid = true }
