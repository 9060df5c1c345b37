//! The one place where the process's TLS provider is chosen.

/// Makes aws-lc-rs the TLS provider of the process. Calling it again, or after someone else chose
/// one, changes nothing.
pub fn init_tls() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // Losing a race means that another thread installed the same.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    }
}
