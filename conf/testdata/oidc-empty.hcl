oidc_discovery {}
