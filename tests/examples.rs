//! The smaller examples do what their docs say. Each is its own binary, over plain TCP.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use common::postgres::PostgresServer;
use common::redis::RedisServer;
use common::scratch::Scratch;

const LONG: Duration = Duration::from_secs(30);

/// An example that runs, ended the hard way when dropped.
struct Example {
    child: Child,
    url: String,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Example {
    async fn start(name: &str, settings: &[(&str, &str)]) -> Self {
        let mut command = Command::from(common::example(name));
        for unset in ["DATABASE_URL", "REDIS_URL", "WITHOUT_ROW"] {
            command.env_remove(unset);
        }
        command.env("ADDR", "127.0.0.1:0").envs(settings.iter().copied());
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("the example, built");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let greeting = timeout(LONG, lines.next_line()).await.unwrap().unwrap().expect("a greeting");
        let addr = greeting.split("http://").nth(1).unwrap().split([' ', '/']).next().unwrap().to_owned();
        Self { child, url: format!("http://{addr}") }
    }

    /// Nothing comes back from a process that dies.
    async fn send(&self, request: http::request::Builder, path: &str, body: &str) -> Option<Answer> {
        let request = request.uri(format!("{}{path}", self.url)).body(Full::from(body.to_owned())).unwrap();
        let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
        let (head, body) = client.request(request).await.ok()?.into_parts();
        let body = String::from_utf8(body.collect().await.ok()?.to_bytes().into()).unwrap();
        Some(Answer { status: head.status.as_u16(), headers: head.headers, body })
    }

    async fn page(&self, path: &str) -> String {
        self.send(Request::get("/"), path, "").await.unwrap().body
    }
}

#[tokio::test]
async fn hyper_counts_an_event_once() {
    let shop = Example::start("hyper", &[]).await;
    let first = shop.send(Request::post("/"), "/hooks/shop", r#"{"id":"evt-1"}"#).await.unwrap();
    let again = shop.send(Request::post("/"), "/hooks/shop", r#"{"id":"evt-1"}"#).await.unwrap();
    assert_eq!((first.status, again.status), (200, 200));
    assert_eq!(first.body, again.body);
    assert_eq!(again.headers["idempotent-replayed"], "true");
    assert_eq!(shop.page("/").await, "1 events\n");
}

#[tokio::test]
async fn a_failure_at_one_stage_repeats_that_stage_alone() {
    for (number, failing) in ["order", "invoice", "stock"].into_iter().enumerate() {
        let shop = Example::start("stages", &[]).await;
        let path = format!("/webhooks/shop?fail={failing}");
        let deliver = async || shop.send(Request::post("/").header("x-event-id", "e-1"), &path, "").await.unwrap();
        let first = deliver().await;
        assert_eq!(first.status, 502);
        assert!(first.body.ends_with(&format!("{failing}: failed\n")));
        assert_eq!(first.body.matches("done").count(), number, "nothing after it is begun");
        for _ in 0..2 {
            let again = deliver().await;
            assert_eq!((again.status, &*again.body), (200, "order: done\ninvoice: done\nstock: done\n"));
        }
        assert_eq!(shop.page("/").await, "order: 1\ninvoice: 1\nstock: 1\n");
    }
}

/// Three deliveries, one of them twice, and one whose process dies when it has been counted.
async fn counted(settings: &[(&str, &str)]) -> String {
    let settings = [settings, &[("LEASE_MS", "300")]].concat();
    let mut postmark = Example::start("postmark_stats", &settings).await;
    let delivery = |recipient: &str, kind: &str| {
        format!(r#"{{"MessageID":"m-1","Recipient":"{recipient}","RecordType":"{kind}"}}"#)
    };
    let path = "/webhooks/postmark";
    for event in [delivery("a", "Delivery"), delivery("a", "Open"), delivery("a", "Delivery"), delivery("b", "Open")] {
        assert_eq!(postmark.send(Request::post("/"), path, &event).await.unwrap().status, 200);
    }
    let fatal = delivery("c", "Delivery");
    assert!(postmark.send(Request::post("/"), "/webhooks/postmark?crash", &fatal).await.is_none());
    timeout(LONG, postmark.child.wait()).await.unwrap().unwrap();
    let postmark = Example::start("postmark_stats", &settings).await;
    let acknowledged = async {
        while postmark.send(Request::post("/"), path, &fatal).await.is_none_or(|answer| answer.status != 200) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LONG, acknowledged).await.expect("it is acknowledged when the lease is over");
    postmark.page("/stats").await
}

#[tokio::test]
async fn statistics_are_right_with_the_row_and_wrong_without() {
    let (dir, redis, postgres) = (Scratch::new(), RedisServer::start(), PostgresServer::start());
    postgres.pool().await;
    let file = |name: &str| format!("sqlite://{}", dir.path().join(name).display());
    let (alone, fronted, bare) = (file("alone.db"), file("fronted.db"), file("bare.db"));
    let right = "Delivery: 2\nOpen: 2\n";
    assert_eq!(counted(&[("DATABASE_URL", &alone)]).await, right);
    assert_eq!(counted(&[("DATABASE_URL", &fronted), ("REDIS_URL", &redis.url())]).await, right);
    assert_eq!(counted(&[("DATABASE_URL", &postgres.url())]).await, right);
    assert_eq!(counted(&[("DATABASE_URL", &bare), ("WITHOUT_ROW", "1")]).await, "Delivery: 3\nOpen: 2\n");
}
