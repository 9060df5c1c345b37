//! The cluster's certificate authority: server certificate, client certificates, signing of CSRs,
//! and the tokens of ServiceAccounts.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// A key and certificates made by [`Pki`].
#[derive(Clone)]
pub struct Identity {
    /// Certificate, PEM.
    pub cert_pem: String,
    /// Private key, PKCS#8 PEM.
    pub key_pem: String,
}

/// The authority.
pub struct Pki {
    issuer: Issuer<'static, KeyPair>,
    ca_der: CertificateDer<'static>,
    ca_pem: String,
    token_key: [u8; 32],
}

impl Pki {
    /// A fresh authority.
    ///
    /// # Errors
    /// When the key cannot be made.
    pub fn new() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "kubernetes");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
            KeyUsagePurpose::KeyCertSign,
        ];
        let cert = params.self_signed(&key)?;
        let mut token_key = [0; 32];
        token_key.fill_with(|| fastrand::u8(..));
        Ok(Self {
            ca_der: cert.der().clone(),
            ca_pem: cert.pem(),
            issuer: Issuer::new(params, key),
            token_key,
        })
    }

    /// The CA's certificate, PEM.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// The CA's certificate.
    pub fn ca_der(&self) -> &CertificateDer<'static> {
        &self.ca_der
    }

    /// `sha256:<hex of the SubjectPublicKeyInfo>`, what `--discovery-token-ca-cert-hash` takes.
    ///
    /// # Errors
    /// When the certificate cannot be parsed.
    pub fn ca_pin(&self) -> Result<String> {
        let (_, cert) = x509_parser::parse_x509_certificate(&self.ca_der)?;
        let digest = Sha256::digest(cert.tbs_certificate.subject_pki.raw);
        Ok(format!("sha256:{}", hex(&digest)))
    }

    /// A serving identity for these addresses and names.
    ///
    /// # Errors
    /// When a name is no host name.
    pub fn server(&self, addresses: &[IpAddr]) -> Result<Identity> {
        let mut names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        names.extend(
            ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
                .map(String::from),
        );
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.issue(params)
    }

    /// A client identity.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn client(&self, user: &str, groups: &[&str]) -> Result<Identity> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, user);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(params)
    }

    fn issue(&self, mut params: CertificateParams) -> Result<Identity> {
        let key = KeyPair::generate()?;
        limit(&mut params, Duration::from_secs(365 * 24 * 3600));
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }

    /// Signs a CSR of one of the kubelet signers.
    ///
    /// # Errors
    /// When the request is malformed or its signature wrong.
    pub fn sign(&self, csr_pem: &str, server: bool, lifetime: Duration) -> Result<String> {
        let mut csr = CertificateSigningRequestParams::from_pem(csr_pem).context("read the CSR")?;
        limit(&mut csr.params, lifetime);
        csr.params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        csr.params.extended_key_usages = vec![if server {
            ExtendedKeyUsagePurpose::ServerAuth
        } else {
            ExtendedKeyUsagePurpose::ClientAuth
        }];
        Ok(csr.signed_by(&self.issuer).context("sign the CSR")?.pem())
    }

    /// A JSON web token for these claims.
    pub fn token(&self, claims: &Value) -> String {
        let head = URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": "test"}).to_string());
        let body = URL_SAFE_NO_PAD.encode(claims.to_string());
        let signature = URL_SAFE_NO_PAD.encode(mac(&self.token_key, &format!("{head}.{body}")));
        format!("{head}.{body}.{signature}")
    }

    /// The claims of a token that this authority made and that has not expired.
    pub fn claims(&self, token: &str) -> Option<Value> {
        let (signed, signature) = token.rsplit_once('.')?;
        if URL_SAFE_NO_PAD.decode(signature).ok()? != mac(&self.token_key, signed) {
            return None;
        }
        let (_, body) = signed.split_once('.')?;
        let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(body).ok()?).ok()?;
        (claims["exp"].as_i64()? > jiff::Timestamp::now().as_second()).then_some(claims)
    }

    /// The TLS server side: client certificates are asked for and, where given, must be the CA's.
    ///
    /// # Errors
    /// When the identity cannot be read.
    pub fn tls_server(&self, identity: &Identity) -> Result<rustls::ServerConfig> {
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(self.ca_der.clone())?;
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(
            std::sync::Arc::new(roots),
            provider.clone(),
        )
        .allow_unauthenticated()
        .build()?;
        let chain = vec![CertificateDer::from_pem_slice(identity.cert_pem.as_bytes())?];
        let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes())?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

fn limit(params: &mut CertificateParams, lifetime: Duration) {
    let now = std::time::SystemTime::now();
    params.not_before = (now - Duration::from_secs(300)).into();
    params.not_after = (now + lifetime).into();
    let mut serial = [0; 16];
    serial.fill_with(|| fastrand::u8(..));
    serial[0] &= 0x7f;
    params.serial_number = Some(serial.to_vec().into());
}

/// HMAC-SHA256.
pub fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = <Hmac<Sha256>>::new_from_slice(key).expect("HMAC takes any key length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The JWS of cluster-info with its payload detached (RFC 7515 appendix F), as the bootstrap signer
/// writes it into `jws-kubeconfig-<token id>`.
pub fn detached_jws(token_id: &str, token_secret: &str, payload: &str) -> String {
    let head = URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": token_id}).to_string());
    let signed = format!("{head}.{}", URL_SAFE_NO_PAD.encode(payload));
    format!("{head}..{}", URL_SAFE_NO_PAD.encode(mac(token_secret.as_bytes(), &signed)))
}
