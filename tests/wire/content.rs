//! What a response is coded in, what it is conditional on, and what follows a request.

use std::io::Read as _;

use flate2::read::GzDecoder;
use http::HeaderValue;
use http_body_util::BodyExt as _;
use tower::{Layer as _, service_fn};
use tower_http::compression::CompressionLayer;

use crate::common::app::{answer, body};
use crate::peers::{Client, Received, Server, Told, api, head, serve, webhook};

#[tokio::test]
async fn a_coded_body_is_told_again_in_its_coding() {
    const CODED: &[u8] = b"\x1f\x8b\x08\0\xff\xfe\r\n\r\n0\r\n";
    for layer in [webhook(), webhook().keep_headers(&["x-a"]), api()] {
        let server = Server::start(&layer, |_, _| async {
            let mut response = answer(200, "")?;
            *response.body_mut() = body(CODED);
            response.headers_mut().insert("content-encoding", HeaderValue::from_static("gzip"));
            Ok(response)
        })
        .await;
        let mut client = server.connect().await;
        for replayed in [false, true] {
            let told = client.ask("k", "", "1").await;
            assert_eq!((&told.body[..], told.is_replayed()), (CODED, replayed));
            assert_eq!(told.headers["content-encoding"], "gzip");
        }
    }
}

fn decoded(told: &Told) -> String {
    let mut text = String::new();
    match told.headers.get("content-encoding") {
        Some(coding) if coding == "gzip" => GzDecoder::new(&told.body[..]).read_to_string(&mut text).unwrap(),
        coding => {
            assert_eq!(coding, None);
            told.text().clone_into(&mut text);
            text.len()
        }
    };
    text
}

#[tokio::test]
async fn c14_what_is_compressed_outside_is_kept_plain_and_told_to_each_as_it_accepts() {
    let text = "a body that is worth to be compressed ".repeat(100);
    for layer in [webhook(), api()] {
        let told_once = text.clone();
        let handler = service_fn(move |_: Received| {
            let text = told_once.clone();
            async { answer(200, text) }
        });
        let addr = serve(CompressionLayer::new().layer(layer.layer(handler))).await;
        let mut client = Client::connect(addr).await;
        for (key, first, then) in [("k", "gzip", ""), ("l", "", "gzip")] {
            for (accepted, replayed) in [(first, false), (then, true), (first, true)] {
                let told = client.ask(key, &format!("accept-encoding: {accepted}\r\n"), "1").await;
                assert_eq!((decoded(&told), told.is_replayed()), (text.clone(), replayed));
                assert_eq!(told.headers.contains_key("content-encoding"), accepted == "gzip");
                assert_eq!(told.body.len() < text.len(), accepted == "gzip");
            }
        }
    }
}

#[tokio::test]
async fn a_condition_on_a_retry_is_not_the_layers_to_judge() {
    let server = Server::start(&api(), |_, run| async move {
        let mut response = answer(201, format!("run {run}"))?;
        response.headers_mut().insert("etag", HeaderValue::from_static("\"1\""));
        response.headers_mut().insert("last-modified", HeaderValue::from_static("Tue, 15 Nov 1994 12:45:26 GMT"));
        response.headers_mut().insert("accept-ranges", HeaderValue::from_static("bytes"));
        Ok(response)
    })
    .await;
    let mut client = server.connect().await;
    client.ask("k", "", "1").await;
    for condition in [
        "if-none-match: \"1\"",
        "if-none-match: *",
        "if-match: \"2\"",
        "if-modified-since: Sat, 29 Oct 2044 19:43:31 GMT",
        "range: bytes=0-1",
    ] {
        let told = client.ask("k", &format!("{condition}\r\n"), "1").await;
        assert_eq!((told.status, told.text(), told.is_replayed()), (201, "run 1", true), "{condition}");
        assert_eq!(told.headers["etag"], "\"1\"");
    }
}

#[tokio::test]
async fn e08_trailers_of_a_request_reach_the_handler_over_http_1() {
    for layer in [webhook(), webhook().stream_request_body(), api()] {
        let server = Server::start(&layer, |request, _| async move {
            let seen = request.into_body().collect().await?;
            let sum = seen.trailers().and_then(|trailers| trailers.get("x-sum")).cloned();
            let mut response = answer(200, format!("{sum:?}: "))?;
            *response.body_mut() = body([&format!("{sum:?}: ").into_bytes()[..], &seen.to_bytes()].concat());
            Ok(response)
        })
        .await;
        let mut client = server.connect().await;
        let chunked = "transfer-encoding: chunked\r\ntrailer: x-sum\r\n";
        for replayed in [false, true] {
            let sent = format!("{}{chunked}\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 7\r\n\r\n", head("POST", "k"));
            client.send(sent).await;
            let told = client.told().await;
            assert_eq!((told.text(), told.is_replayed()), ("Some(\"7\"): abcde", replayed));
        }
        assert_eq!(server.runs(), 1);
    }
}
