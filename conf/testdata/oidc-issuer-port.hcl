authority "local" { jwt_issuer = "https://issuer.example.org:84440" }
