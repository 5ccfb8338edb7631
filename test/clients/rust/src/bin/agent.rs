use spiffe::X509Source;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let source = X509Source::new().await?; // reads SPIFFE_ENDPOINT_SOCKET, waits for an identity
    let mut updates = source.updated();
    loop {
        println!("{}", source.svid()?.spiffe_id());
        updates.changed().await?; // each renewal
    }
}
