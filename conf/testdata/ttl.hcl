authority "local" {
  ca_ttl = "1h"
}
entry "/a" {
  selectors = ["unix:uid:1"]
  x509_ttl  = "10m1s"
  jwt_ttl   = "4s"
}
entry "/b" {
  selectors = ["unix:uid:1"]
  x509_ttl  = "an hour"
  jwt_ttl   = "5500ms"
}
entry "/c" {
  selectors = ["unix:uid:1"]
  x509_ttl  = "0s"
  jwt_ttl   = "-1m"
}
