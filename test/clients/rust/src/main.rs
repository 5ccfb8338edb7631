//! A SPIFFE workload in Rust. ../../clients_test.go says what it prints.

use std::fmt::Display;

use base64::{engine::general_purpose::STANDARD, Engine as _};
use spiffe::{Certificate, SpiffeId, WorkloadApiClient, X509BundleSet, X509Context, X509Source};

type Failure = Box<dyn std::error::Error>;

#[tokio::main]
async fn main() -> Result<(), Failure> {
    if std::env::args().nth(1).as_deref() == Some("watch") {
        watch().await
    } else {
        fetch("tool").await
    }
}

async fn watch() -> Result<(), Failure> {
    println!("watching");
    let source = X509Source::new().await?; // waits for an identity
    let mut updates = source.updated();
    loop {
        match source.x509_context() {
            Ok(context) => show(&context),
            Err(err) => failed("watch", err),
        }
        updates.changed().await?;
    }
}

async fn fetch(audience: &str) -> Result<(), Failure> {
    let client = WorkloadApiClient::connect_env().await?; // reads SPIFFE_ENDPOINT_SOCKET
    match client.fetch_x509_context().await {
        Ok(context) => show(&context),
        Err(err) => failed("x509", err),
    }
    match client.fetch_x509_bundles().await {
        Ok(found) => bundles(&found),
        Err(err) => failed("x509-bundles", err),
    }
    match client.fetch_jwt_svid([audience, "second"], None).await {
        Ok(svid) => {
            let token = svid.token();
            println!("jwt {} {}", svid.spiffe_id(), token);
            let valid = client.validate_jwt_token(audience, token).await?;
            println!("valid {}", valid.spiffe_id());
            if let Err(err) = client.validate_jwt_token("other", token).await {
                failed("audience", err);
            }
            let forged = format!("{}AAAAAAAA", &token[..token.len() - 8]);
            if let Err(err) = client.validate_jwt_token(audience, &forged).await {
                failed("forged", err);
            }
        }
        Err(err) => failed("jwt", err),
    }
    let stranger: SpiffeId = "spiffe://clients.example/stranger".parse()?;
    if let Err(err) = client.fetch_jwt_svid([audience], Some(&stranger)).await {
        failed("stranger", err);
    }
    match client.fetch_jwt_bundles().await {
        Ok(found) => {
            for (domain, bundle) in found.iter() {
                let keys: Vec<_> = bundle.jwt_authorities().map(|key| key.key_id()).collect();
                println!("jwt-bundle {domain} {}", keys.join(" "));
            }
        }
        Err(err) => failed("jwt-bundles", err),
    }
    println!("done");
    Ok(())
}

fn failed(step: &str, err: impl Display) {
    println!("error {step} {}", err.to_string().split_whitespace().collect::<Vec<_>>().join(" "));
}

fn show(context: &X509Context) {
    for svid in context.svids() {
        println!("x509 {} {}", svid.spiffe_id(), der(svid.cert_chain()));
    }
    bundles(context.bundle_set());
    println!("updated");
}

fn bundles(found: &X509BundleSet) {
    for (domain, bundle) in found.iter() {
        println!("x509-bundle {domain} {}", der(bundle.authorities()));
    }
}

fn der(certificates: &[Certificate]) -> String {
    let encoded: Vec<_> = certificates.iter().map(|one| STANDARD.encode(one.as_bytes())).collect();
    encoded.join(" ")
}
