//! Connections that become something else.

use http::{Method, Response};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tower::BoxError;
use tower_idempotency::{Attempt, IdempotencyLayer};

use crate::common::app::{Body, answer, body};
use crate::peers::{Received, Server, api, head, webhook};

/// Takes over the connection, and says everything again that comes.
fn take_over(request: Received) -> Result<Response<Body>, BoxError> {
    assert!(request.extensions().get::<Attempt>().is_none());
    let is_tunnel = request.method() == Method::CONNECT;
    tokio::spawn(async move {
        let mut connection = TokioIo::new(hyper::upgrade::on(request).await.expect("an upgrade"));
        let mut said = [0; 64];
        while let Ok(length @ 1..) = connection.read(&mut said).await {
            connection.write_all(&said[..length]).await.unwrap();
        }
    });
    let response = Response::builder();
    Ok(match is_tunnel {
        true => response.status(200),
        false => response.status(101).header("connection", "upgrade").header("upgrade", "echo"),
    }
    .body(body(""))
    .unwrap())
}

async fn echoing(layer: &IdempotencyLayer) -> Server {
    Server::start(layer, |request, run| async move {
        match request.method() == Method::CONNECT || request.headers().get("upgrade").is_some_and(|to| to == "echo") {
            true => take_over(request),
            false => answer(200, format!("run {run}")),
        }
    })
    .await
}

#[tokio::test]
async fn a29_an_upgrade_passes_through_whatever_key_it_has() {
    for layer in [webhook(), api(), webhook().require_key(), api().require_key()] {
        let server = echoing(&layer).await;
        for (run, method) in [(1, "GET"), (2, "GET"), (3, "POST")] {
            let mut client = server.connect().await;
            let offer = "connection: keep-alive, Upgrade\r\nupgrade: echo\r\n";
            client.send(format!("{}{offer}\r\nsent at once, ", head(method, "k"))).await;
            let told = client.told().await;
            assert_eq!((told.status, told.headers["upgrade"].as_bytes()), (101, &b"echo"[..]));
            client.send("and later").await;
            assert_eq!(client.bytes(23).await.unwrap(), b"sent at once, and later");
            client.half_close().await;
            assert!(client.is_closed().await);
            assert_eq!((told.is_replayed(), server.runs()), (false, run));
        }
    }
}

#[tokio::test]
async fn a29_a_tunnel_passes_through_whatever_key_it_has() {
    for layer in [webhook().require_key(), api().require_key()] {
        let server = echoing(&layer).await;
        for run in [1, 2] {
            let mut client = server.connect().await;
            let tunnel = head("CONNECT", "k").replace("CONNECT /", "CONNECT example.com:443");
            client.send(format!("{tunnel}\r\n")).await;
            let told = client.told_without_body().await.unwrap();
            assert_eq!((told.status, told.is_replayed(), server.runs()), (200, false, run));
            client.send("through").await;
            assert_eq!(client.bytes(7).await.unwrap(), b"through");
        }
    }
}

#[tokio::test]
async fn an_offer_of_http_2_is_protected_as_the_request_it_is() {
    let server = echoing(&webhook()).await;
    let mut client = server.connect().await;
    for replayed in [false, true] {
        let offer =
            "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n";
        let told = client.ask("k", offer, "1").await;
        assert_eq!((told.status, told.text(), told.is_replayed()), (200, "run 1", replayed));
    }
}
