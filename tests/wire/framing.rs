//! Many requests on one connection: each response ends where the next begins.

use std::io;

use http::Response;
use http_body_util::BodyExt as _;
use tower_idempotency::IdempotencyLayer;

use crate::common::app::{answer, chunk, frames};
use crate::peers::{Server, api, head, post, webhook};

async fn counting(layer: &IdempotencyLayer, status: u16) -> Server {
    Server::start(layer, move |request, run| async move {
        let seen = request.into_body().collect().await?.to_bytes();
        answer(status, format!("run {run}: {}", String::from_utf8_lossy(&seen)))
    })
    .await
}

#[tokio::test]
async fn duplicates_in_one_write_are_answered_in_their_order() {
    for layer in [webhook(), api()] {
        let server = counting(&layer, 200).await;
        let mut client = server.connect().await;
        client.send([post("k", "", "a"), post("k", "", "a")].concat()).await;
        for replayed in [false, true] {
            let told = client.told().await;
            assert_eq!((told.text(), told.is_replayed()), ("run 1: a", replayed));
        }
        assert_eq!(server.runs(), 1);
    }
}

#[tokio::test]
async fn different_requests_in_one_write_are_answered_in_their_order() {
    let server = counting(&webhook(), 200).await;
    let mut client = server.connect().await;
    let requests = [("a", "1"), ("b", "22"), ("c", ""), ("b", "22")].map(|(key, body)| post(key, "", body));
    client.send(requests.concat()).await;
    for (text, replayed) in [("run 1: 1", false), ("run 2: 22", false), ("run 3: ", false), ("run 2: 22", true)] {
        let told = client.told().await;
        assert_eq!((told.text(), told.is_replayed()), (text, replayed));
    }
}

#[tokio::test]
async fn a_refusal_ends_where_the_next_response_begins() {
    let server = counting(&api().require_key(), 201).await;
    let mut client = server.connect().await;
    let keyless = "POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nbody";
    client.send([keyless, &post("k", "", "a"), &post("k", "", "b"), &post("k", "", "a")].concat()).await;
    assert_eq!(client.told().await.code(), "key_missing");
    assert_eq!(client.told().await.text(), "run 1: a");
    assert_eq!(client.told().await.code(), "key_reused");
    assert!(client.told().await.is_replayed());
}

#[tokio::test]
async fn a_head_request_passes_and_gets_no_body() {
    // A webhook may come by GET; asking what it would be answered is no delivery.
    let server = counting(&webhook().require_key(), 200).await;
    let mut client = server.connect().await;
    client.send(format!("{}\r\n", head("GET", "k"))).await;
    assert_eq!(client.told().await.text(), "run 1: ");
    for runs in [2, 3] {
        client.send(format!("{}\r\n", head("HEAD", "k"))).await;
        let told = client.told_without_body().await.unwrap();
        assert_eq!((told.status, told.is_replayed(), server.runs()), (200, false, runs));
        assert_eq!(told.headers["content-length"], "7");
    }
    client.send(format!("{}\r\n", head("GET", "k"))).await;
    let told = client.told().await;
    assert_eq!((told.text(), told.is_replayed(), server.runs()), ("run 1: ", true, 3));
}

#[tokio::test]
async fn a_replay_without_content_ends_with_its_head() {
    for status in [204, 304] {
        // A handler may give a body to what has none; nobody is told of it.
        for text in ["", "a body"] {
            let server = Server::start(&api(), move |_, _| async move {
                let mut response = answer(status, text)?;
                response.headers_mut().insert("etag", "\"1\"".parse()?);
                Ok(response)
            })
            .await;
            let mut client = server.connect().await;
            for replayed in [false, true, true] {
                let told = client.ask("k", "", "1").await;
                assert_eq!((told.status, told.is_replayed()), (status, replayed));
                assert_eq!(told.headers["etag"], "\"1\"");
                let is_framed = |name: &str| told.headers.contains_key(name);
                assert!(!is_framed("content-length") || status == 304 && !replayed, "{told:?}");
                assert!(!is_framed("transfer-encoding"), "{told:?}");
            }
            assert_eq!(server.runs(), 1);
        }
    }
}

#[tokio::test]
async fn an_acknowledgement_of_what_had_no_content_has_none_of_a_known_length() {
    let server = Server::start(&webhook(), |_, _| async { answer(204, "") }).await;
    let mut client = server.connect().await;
    assert_eq!(client.ask("k", "", "1").await.status, 204);
    for _ in 0..2 {
        let told = client.ask("k", "", "1").await;
        assert_eq!((told.status, told.headers["content-length"].as_bytes()), (200, &b"0"[..]));
    }
}

#[tokio::test]
async fn a_response_that_is_not_kept_ends_where_the_next_begins() {
    for announced in [true, false] {
        let server = Server::start(&webhook().max_kept_body(4), move |_, _| async move {
            let response = Response::builder();
            let response = if announced { response.header("content-length", "9") } else { response };
            Ok(response.body(frames(vec![chunk("abc"), chunk("def"), chunk("ghi")])).unwrap())
        })
        .await;
        let mut client = server.connect().await;
        let told = client.ask("k", "", "1").await;
        assert_eq!((told.text(), told.headers["idempotency-stored"].as_bytes()), ("abcdefghi", &b"false"[..]));
        assert_eq!(told.headers.contains_key("content-length"), announced);
        let told = client.ask("k", "", "1").await;
        assert_eq!((told.text(), told.is_replayed(), server.runs()), ("", true, 1));
    }
}

#[tokio::test]
async fn a_response_that_breaks_off_does_not_look_whole_and_runs_again() {
    for kept in [1 << 20, 2] {
        let server = Server::start(&webhook().max_kept_body(kept), |_, run| async move {
            match run {
                1 => Ok(Response::new(frames(vec![chunk("abc"), Err(io::Error::other("broken off"))]))),
                _ => answer(200, "whole"),
            }
        })
        .await;
        let mut client = server.connect().await;
        client.send(post("k", "", "1")).await;
        client.try_told().await.expect_err("half a response");
        let mut client = server.connect().await;
        assert_eq!(client.ask("k", "", "1").await.text(), "whole");
        assert!(client.ask("k", "", "1").await.is_replayed());
    }
}
