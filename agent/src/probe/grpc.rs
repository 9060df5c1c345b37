//! gRPC checks, by the health protocol.

use std::net::{IpAddr, SocketAddr};

use tonic::transport::Endpoint;

use super::Outcome;

mod wire {
    #![allow(clippy::all, missing_docs, reason = "generated code")]
    tonic::include_proto!("grpc.health.v1");
}

use wire::health_check_response::ServingStatus;
use wire::health_client::HealthClient;

/// Asks whether `service` is serving.
pub(super) async fn check_grpc(pod_ip: Option<IpAddr>, port: i32, service: &str) -> Outcome {
    let Some(ip) = pod_ip else {
        return Outcome::Unknown("the pod has no address yet".into());
    };
    let Ok(port) = u16::try_from(port) else {
        return Outcome::Unknown(format!("invalid port: {port}"));
    };
    let address = SocketAddr::new(ip, port);
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .and_then(|e| e.user_agent("kube-probe/1.36"));
    let channel = match endpoint {
        Ok(endpoint) => endpoint.connect().await,
        Err(error) => return Outcome::Unknown(error.to_string()),
    };
    let mut client = match channel {
        Ok(channel) => HealthClient::new(channel),
        Err(error) => {
            return Outcome::Failure(format!(
                "error: health rpc probe failed: cannot connect to {address}: {error}"
            ));
        }
    };
    let request = wire::HealthCheckRequest { service: service.to_owned() };
    match client.check(request).await {
        Ok(response) => match response.into_inner().status() {
            ServingStatus::Serving => Outcome::Success,
            other => Outcome::Failure(format!(
                "service unhealthy (responded with \"{}\")",
                other.as_str_name()
            )),
        },
        Err(status) if status.code() == tonic::Code::Unimplemented => Outcome::Failure(
            "error: this server does not implement the grpc health protocol (grpc.health.v1.Health)"
                .into(),
        ),
        Err(status) => {
            Outcome::Failure(format!("error: health rpc probe failed: {}", status.message()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::wire::health_server::{Health, HealthServer};
    use super::*;
    use tonic::{Request, Response, Status};

    struct Named;

    #[tonic::async_trait]
    impl Health for Named {
        async fn check(
            &self,
            request: Request<wire::HealthCheckRequest>,
        ) -> Result<Response<wire::HealthCheckResponse>, Status> {
            let status = match &*request.into_inner().service {
                "" => ServingStatus::Serving,
                "down" => ServingStatus::NotServing,
                _ => return Err(Status::not_found("unknown service")),
            };
            Ok(Response::new(wire::HealthCheckResponse { status: status.into() }))
        }
    }

    #[tokio::test]
    async fn serving_is_healthy() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(HealthServer::new(Named))
                .serve_with_incoming(incoming),
        );
        let port = address.port().into();
        let ip = Some(address.ip());
        assert_eq!(check_grpc(ip, port, "").await, Outcome::Success);
        for service in ["down", "other"] {
            let outcome = check_grpc(ip, port, service).await;
            assert!(matches!(outcome, Outcome::Failure(_)), "{service}: {outcome:?}");
        }
    }
}
