//! The shop, as its users meet it: the example's own binary, real TCP, a real Redis, and a real `kill -9`.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Request, response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use common::metrics::Metrics;
use common::postgres::PostgresServer;
use common::redis::RedisServer;
use common::scratch::Scratch;
use common::until;

/// A shop that is open, closed the hard way when dropped.
struct Shop {
    child: Child,
    addr: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    headers: HeaderMap,
    json: Value,
}

impl Shop {
    async fn open(settings: &[(&str, &str)]) -> Self {
        let mut command = Command::from(common::example("orders"));
        command
            .env("ADDR", "127.0.0.1:0")
            .env_remove("REDIS_URL")
            .env_remove("DATABASE_URL")
            .envs(settings.iter().copied());
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("the example, built");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let greeting = timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap().unwrap();
        let addr = greeting.split("http://").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { child, addr, client: Client::builder(TokioExecutor::new()).build_http() }
    }

    async fn send(&self, request: http::request::Builder, path: &str, body: &Value) -> Result<Answer, String> {
        let (head, body) = self.exchange(request, path, body.to_string()).await?;
        let json = serde_json::from_slice(&body).unwrap_or(Value::Null);
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, json })
    }

    async fn exchange(
        &self,
        request: http::request::Builder,
        path: &str,
        body: String,
    ) -> Result<(response::Parts, Bytes), String> {
        let request = request.uri(format!("http://{}{path}", self.addr)).body(Full::new(Bytes::from(body))).unwrap();
        let response = self.client.request(request).await.map_err(|error| error.to_string())?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.map_err(|error| error.to_string())?.to_bytes();
        Ok((head, body))
    }

    async fn event(&self, path: &str, id: &str) -> Answer {
        let event = json!({ "event_id": id, "sku": "tea", "quantity": 2 });
        self.send(Request::post("/"), path, &event).await.unwrap()
    }

    async fn order(&self, path: &str, key: &str, caller: &str) -> Answer {
        let request = Request::post("/").header("idempotency-key", key).header("authorization", caller);
        self.send(request, path, &json!({ "sku": "tea", "quantity": 2 })).await.unwrap()
    }

    async fn books(&self) -> Value {
        self.send(Request::get("/"), "/books", &Value::Null).await.unwrap().json
    }

    async fn page(&self, path: &str) -> String {
        let (_, page) = self.exchange(Request::get("/"), path, String::new()).await.unwrap();
        String::from_utf8(page.to_vec()).unwrap()
    }

    async fn metrics(&self) -> Metrics {
        Metrics::parse(&self.page("/metrics").await)
    }
}

#[tokio::test]
async fn an_order_its_invoice_and_its_stock_change_once() {
    let shop = Shop::open(&[]).await;
    let first = shop.order("/orders", "o-1", "Bearer a").await;
    assert_eq!((first.status, &first.headers["location"]), (201, &"/orders/1".parse().unwrap()));
    assert_eq!(first.json, json!({ "order": 1, "invoice": 1, "sku": "tea", "quantity": 2 }));
    let again = shop.order("/orders", "\"o-1\"", "Bearer a").await;
    assert_eq!((again.status, &again.json, &again.headers["location"]), (201, &first.json, &first.headers["location"]));
    assert_eq!(again.headers["idempotent-replayed"], "true");
    assert_eq!(shop.order("/orders", "o-1", "Bearer b").await.json["order"], 2, "another caller");
    assert_eq!(shop.order("/orders?x=1", "o-1", "Bearer a").await.status, 422, "another payload");
    let without_key = shop.send(Request::post("/"), "/orders", &json!({ "sku": "tea", "quantity": 1 })).await.unwrap();
    assert_eq!((without_key.status, &without_key.json["code"]), (400, &"key_missing".into()));

    assert_eq!(shop.event("/webhooks/shop", "e-1").await.json["order"], 3);
    assert_eq!(shop.event("/webhooks/shop", "e-1").await.json["order"], 3);
    let by_header = Request::post("/").header("x-idempotency-key", "e-1");
    let by_header = shop.send(by_header, "/webhooks/shop", &json!({ "sku": "tea", "quantity": 2 })).await.unwrap();
    assert_eq!(by_header.json["order"], 3, "the value counts, not where it was found");

    let delivery =
        |recipient: &str, kind: &str| json!({ "MessageID": "m", "Recipient": recipient, "RecordType": kind });
    for event in [delivery("a", "Delivery"), delivery("a", "Open"), delivery("b", "Open"), delivery("a", "Open")] {
        assert_eq!(shop.send(Request::post("/"), "/webhooks/postmark", &event).await.unwrap().status, 200);
    }
    let books = shop.books().await;
    let expected = json!({ "orders": 3, "invoices": 3, "stock": { "tea": 994 }, "deliveries": 3, "runs": 6 });
    assert_eq!(books, expected);
}

#[tokio::test]
async fn sixty_four_simultaneous_posts_of_one_event_run_once() {
    let shop = Shop::open(&[]).await;
    let posts = (0..64).map(|_| shop.event("/webhooks/shop?delay_ms=300", "e"));
    let answers = join_all(posts).await;
    assert!(answers.iter().all(|answer| answer.status == 200 && answer.json == answers[0].json), "{answers:?}");
    assert_eq!(shop.books().await["runs"], 1);
}

#[tokio::test]
async fn a_client_that_hangs_up_and_retries_gets_the_first_outcome() {
    let shop = Shop::open(&[]).await;
    let path = "/webhooks/shop?delay_ms=600";
    assert!(timeout(Duration::from_millis(200), shop.event(path, "e")).await.is_err());
    let retry = shop.event(path, "e").await;
    assert_eq!((retry.status, &retry.json["order"]), (200, &json!(1)));
    assert_eq!(shop.books().await["runs"], 1);
}

#[tokio::test]
async fn a_handler_that_fails_twice_makes_one_order_in_three_runs() {
    let shop = Shop::open(&[]).await;
    for route in ["/webhooks/shop?fail=500&times=2", "/webhooks/shop?fail=panic&times=2&x"] {
        let id = route;
        let before = shop.books().await;
        let mut statuses = Vec::new();
        for _ in 0..5 {
            statuses.push(shop.event(route, id).await.status);
        }
        assert_eq!(statuses, [500, 500, 200, 200, 200]);
        let after = shop.books().await;
        let more = |what: &str| after[what].as_u64().unwrap() - before[what].as_u64().unwrap();
        assert_eq!((more("runs"), more("orders"), more("invoices")), (3, 1, 1));
    }
}

#[tokio::test]
async fn two_processes_on_one_redis_make_one_order_per_key() {
    let redis = RedisServer::start();
    two_processes_make_one_order_per_key("REDIS_URL", &redis.url()).await;
}

#[tokio::test]
async fn two_processes_on_one_postgres_make_one_order_per_key() {
    let server = PostgresServer::shared();
    server.pool().await;
    two_processes_make_one_order_per_key("DATABASE_URL", &server.url()).await;
}

#[tokio::test]
async fn two_processes_on_one_file_make_one_order_per_key_and_it_is_there_for_the_next() {
    let dir = Scratch::new();
    let url = format!("sqlite://{}", dir.path().join("shop.db").display());
    two_processes_make_one_order_per_key("DATABASE_URL", &url).await;
    let next = Shop::open(&[("DATABASE_URL", &url)]).await;
    let again = next.event("/webhooks/shop", "e-0").await;
    assert_eq!(again.headers.get("idempotent-replayed").map(HeaderValue::as_bytes), Some(&b"true"[..]), "{again:?}");
}

async fn two_processes_make_one_order_per_key(name: &str, url: &str) {
    let settings = [(name, url), ("PATIENCE_MS", "20000")];
    let shops = [Shop::open(&settings).await, Shop::open(&settings).await];
    let posts = (0..200).map(|n| {
        // Each key comes to both.
        let shop = &shops[n / 20 % 2];
        async move {
            loop {
                let answer = match n % 4 {
                    0 | 1 => shop.event("/webhooks/shop?delay_ms=20", &format!("e-{}", n % 10)).await,
                    _ => shop.order("/orders?delay_ms=20", &format!("o-{}", n % 10), "Bearer a").await,
                };
                // A file that others write to for too long is a refusal, and a refusal is not the end of an event.
                if answer.status != 503 {
                    return answer;
                }
                sleep(Duration::from_millis(100)).await;
            }
        }
    });
    let answers = join_all(posts).await;
    let refused: Vec<_> = answers.iter().filter(|answer| !matches!(answer.status, 200 | 201)).collect();
    assert!(refused.is_empty(), "{refused:?}");
    let books = [shops[0].books().await, shops[1].books().await];
    let total = |what: &str| books.iter().map(|books| books[what].as_u64().unwrap()).sum::<u64>();
    assert_eq!((total("orders"), total("invoices"), total("runs")), (20, 20, 20), "{books:?}");
}

#[tokio::test]
async fn what_a_killed_process_was_doing_is_done_by_the_survivor() {
    let redis = RedisServer::start();
    let url = redis.url();
    let settings = [("REDIS_URL", url.as_str()), ("LEASE_MS", "1000")];
    let (mut dies, survives) = (Shop::open(&settings).await, Shop::open(&settings).await);
    let path = "/webhooks/shop?delay_ms=400";
    assert!(timeout(Duration::from_millis(200), dies.event(path, "e")).await.is_err());
    dies.child.kill().await.unwrap();
    let killed = Instant::now();
    let mut retry = survives.event(path, "e").await;
    while retry.status == 503 {
        sleep(Duration::from_millis(50)).await;
        retry = survives.event(path, "e").await;
    }
    assert_eq!((retry.status, &retry.json["order"]), (200, &json!(1)));
    assert!(killed.elapsed() < Duration::from_millis(2000 + 400), "{:?}", killed.elapsed());
    assert_eq!(survives.books().await["runs"], 1);
}

#[tokio::test]
async fn a_redis_that_is_down_is_a_503_and_no_crash() {
    let mut redis = RedisServer::start();
    redis.kill();
    let url = redis.url();
    let shop = Shop::open(&[("REDIS_URL", &url)]).await;
    for _ in 0..3 {
        let started = Instant::now();
        let refused = shop.event("/webhooks/shop", "e").await;
        assert_eq!((refused.status, &refused.json["code"]), (503, &"store_unavailable".into()));
        assert!(refused.headers.contains_key("retry-after"));
        assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    }
    assert_eq!(shop.books().await["runs"], 0);
}

#[tokio::test]
async fn the_environment_overrides_the_defaults() {
    let shop = Shop::open(&[("RETENTION_MS", "300"), ("PATIENCE_MS", "0")]).await;
    let slow = shop.event("/webhooks/shop?delay_ms=1500", "e");
    let impatient = async {
        sleep(Duration::from_millis(100)).await;
        shop.event("/webhooks/shop", "e").await
    };
    let (slow, impatient) = futures_util::join!(slow, impatient);
    assert_eq!((slow.status, impatient.status), (200, 503));
    sleep(Duration::from_millis(400)).await;
    assert_eq!(shop.event("/webhooks/shop", "e").await.json["order"], 2, "the retention is over");
}

#[tokio::test]
async fn the_page_of_metrics_counts_what_came_of_each_request() {
    let shop = Shop::open(&[("PATIENCE_MS", "20000")]).await;
    let slow = "/webhooks/shop?delay_ms=1500";
    let running = async {
        until(async || shop.metrics().await.get(r#"idempotency_attempts{state="running"}"#) == 1.0).await;
        let duplicate = shop.event(slow, "e-1");
        let waiting = until(async || shop.metrics().await.get("idempotency_waiters") == 1.0);
        futures_util::join!(duplicate, waiting).0
    };
    let (first, duplicate) = futures_util::join!(shop.event(slow, "e-1"), running);
    assert_eq!((first.status, duplicate.status), (200, 200));
    shop.event(slow, "e-1").await;
    assert_eq!(shop.event("/webhooks/shop?fail=500", "e-2").await.status, 500);
    assert_eq!(shop.event("/webhooks/shop?fail=panic", "e-3").await.status, 500);
    let without_key = json!({ "sku": "tea", "quantity": 1 });
    shop.send(Request::post("/"), "/webhooks/shop", &without_key).await.unwrap();
    shop.order("/orders", "o-1", "Bearer a").await;
    assert_eq!(shop.order("/orders", "o-1", "Bearer a").await.status, 201);
    assert_eq!(shop.order("/orders?other", "o-1", "Bearer a").await.status, 422);
    assert_eq!(shop.send(Request::post("/"), "/orders", &without_key).await.unwrap().status, 400);

    // An attempt answers first and reports then.
    until(async || shop.metrics().await.sum("idempotency_requests_total") >= 10.0).await;
    let metrics = shop.metrics().await;
    let requests = |contract: &str, outcome: &str, reason: &str| {
        let labels = format!(r#"contract="{contract}",outcome="{outcome}",reason="{reason}""#);
        metrics.get(&format!("idempotency_requests_total{{{labels}}}"))
    };
    assert_eq!(requests("webhook", "executed", "kept"), 1.0);
    assert_eq!(requests("webhook", "replayed", ""), 2.0);
    assert_eq!(requests("webhook", "executed", "released"), 1.0);
    assert_eq!(requests("webhook", "executed", "panicked"), 1.0);
    assert_eq!(requests("webhook", "passed_through", "key_missing"), 1.0);
    assert_eq!(requests("api", "executed", "kept"), 1.0);
    assert_eq!(requests("api", "replayed", ""), 1.0);
    assert_eq!(requests("api", "refused", "key_reused"), 1.0);
    assert_eq!(requests("api", "refused", "key_missing"), 1.0);
    assert_eq!(metrics.sum("idempotency_requests_total"), 10.0, "each request once, and no page of books or metrics");

    let count = |name: &str, labels: &str| metrics.get(&format!("idempotency_{name}_seconds_count{{{labels}}}"));
    assert_eq!(count("claim", r#"contract="webhook",result="acquired""#), 3.0);
    assert_eq!(count("claim", r#"contract="webhook",result="done""#), 1.0, "who waited did not ask");
    assert_eq!(count("claim", r#"contract="api",result="mismatch""#), 1.0);
    assert_eq!(count("run", r#"contract="webhook""#), 3.0);
    assert_eq!(count("run", r#"contract="api""#), 1.0);
    assert_eq!(count("wait", r#"contract="webhook",outcome="replayed""#), 1.0);
    assert_eq!(metrics.sum("idempotency_wait_seconds_count"), 1.0);
    assert_eq!(count("complete", r#"contract="webhook",result="stored""#), 1.0);
    assert_eq!(count("complete", r#"contract="api",result="stored""#), 1.0);
    let slow = metrics.get(r#"idempotency_run_seconds_bucket{contract="webhook",le="1"}"#);
    assert_eq!(slow, 2.0, "two failed at once, and one slept");

    for gauge in ["idempotency_attempts", "idempotency_waiters", "idempotency_claims_given_up"] {
        assert!(metrics.of(gauge).next().is_some(), "{gauge} is not there");
        until(async || shop.metrics().await.sum(gauge) == 0.0).await;
    }
    let page = shop.page("/metrics").await;
    for (name, kind) in [
        ("idempotency_requests_total", "counter"),
        ("idempotency_claim_seconds", "histogram"),
        ("idempotency_run_seconds", "histogram"),
        ("idempotency_wait_seconds", "histogram"),
        ("idempotency_complete_seconds", "histogram"),
        ("idempotency_attempts", "gauge"),
        ("idempotency_waiters", "gauge"),
        ("idempotency_claims_given_up", "gauge"),
    ] {
        assert!(page.contains(&format!("# HELP {name} ")), "{name} is not described");
        assert!(page.contains(&format!("# TYPE {name} {kind}\n")), "{name} is no {kind}");
    }
}
