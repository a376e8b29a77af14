//! The user who presses "Send" twice: the example's own binary, over plain TCP, and in a real browser.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test panics where it fails")]

mod common;

use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use futures_util::join;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use common::browser::Browser;

const URLENCODED: &str = "application/x-www-form-urlencoded";

/// A shop that is open, closed the hard way when dropped.
struct Shop {
    _child: Child,
    url: String,
    client: Client<HttpConnector, Full<Bytes>>,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: String,
}

impl Shop {
    async fn open(delay_ms: &str) -> Self {
        let mut command = Command::from(common::example("double_click"));
        command.env("ADDR", "127.0.0.1:0").env("DELAY_MS", delay_ms);
        let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("the example, built");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let greeting = timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap().unwrap();
        let addr = greeting.split("http://").nth(1).unwrap().split(' ').next().unwrap();
        let client = Client::builder(TokioExecutor::new()).build_http();
        Self { _child: child, url: format!("http://{addr}"), client }
    }

    async fn send(&self, request: http::request::Builder, path: &str, body: &str) -> Answer {
        let request = request.uri(format!("{}{path}", self.url)).body(Full::from(body.to_owned())).unwrap();
        let (head, body) = self.client.request(request).await.unwrap().into_parts();
        let body = String::from_utf8(body.collect().await.unwrap().to_bytes().into()).unwrap();
        Answer { status: head.status.as_u16(), headers: head.headers, body }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get("/"), path, "").await
    }

    async fn post(&self, content_type: &str, body: &str) -> Answer {
        self.send(Request::post("/").header("content-type", content_type), "/orders", body).await
    }
}

impl Answer {
    fn location(&self) -> &str {
        self.headers.get("location").map_or("nowhere", |location| location.to_str().unwrap())
    }
}

/// What stands between two texts.
fn between<'t>(text: &'t str, before: &str, after: &str) -> &'t str {
    text.split_once(before).unwrap().1.split_once(after).unwrap().0
}

#[tokio::test]
async fn one_form_sent_twice_at_a_time_is_one_order() {
    let shop = Shop::open("300").await;
    let pages = [shop.get("/").await, shop.get("/").await];
    let tokens = pages.each_ref().map(|page| between(&page.body, r#"name="token" value=""#, "\""));
    assert_ne!(tokens[0], tokens[1]);
    assert_eq!(pages[0].headers["cache-control"], "no-store");

    let form = format!("token={}", tokens[0]);
    let (one, two) = join!(shop.post(URLENCODED, &form), shop.post(URLENCODED, &form));
    assert_eq!([one.status, two.status], [303, 303]);
    assert_eq!([one.location(), two.location()], ["/orders/1"; 2]);
    assert!(one.headers.contains_key("idempotent-replayed") != two.headers.contains_key("idempotent-replayed"));

    let other = shop.post(URLENCODED, &format!("token={}", tokens[1])).await;
    assert_eq!((other.status, other.location()), (303, "/orders/2"));
    let order = shop.get("/orders/2").await;
    assert!(order.body.contains("<h1>Order 2</h1>"), "{}", order.body);
    assert_eq!([between(&order.body, r#"orders">"#, "<"), between(&order.body, r#"posts">"#, "<")], ["2", "3"]);
    assert_eq!([shop.get("/orders/3").await.status, shop.get("/orders/0").await.status], [404; 2]);
}

#[tokio::test]
async fn a_multipart_form_is_one_order_and_a_form_without_a_token_is_none() {
    let shop = Shop::open("0").await;
    let multipart =
        |token: &str| format!("--b\r\nContent-Disposition: form-data; name=\"token\"\r\n\r\n{token}\r\n--b--\r\n");
    for (token, order) in [("t-1", "/orders/1"), ("t-1", "/orders/1"), ("t-2", "/orders/2")] {
        let answer = shop.post("multipart/form-data; boundary=b", &multipart(token)).await;
        assert_eq!((answer.status, answer.location()), (303, order));
    }
    for (content_type, form, code) in [
        (URLENCODED, "", "key_missing"),
        (URLENCODED, "token=", "key_missing"),
        (URLENCODED, "other=t-1", "key_missing"),
        ("application/json", r#"{"x":"&token=t-3&"}"#, "key_missing"),
        (URLENCODED, "token=t-3&token=t-4", "key_malformed"),
        ("multipart/form-data", "token=t-3", "key_malformed"),
    ] {
        let refused = shop.post(content_type, form).await;
        assert_eq!(refused.status, 400, "{form}");
        assert!(refused.body.contains(code), "{form}: {}", refused.body);
    }
    assert_eq!(between(&shop.get("/orders/1").await.body, r#"orders">"#, "<"), "2");
}

/// The browser gives the first press up in favour of the second, and its request is on its way all the same.
#[tokio::test]
async fn a_double_click_in_a_browser_is_one_order() {
    let shop = Shop::open("2500").await;
    let mut browser = Browser::open().await;
    browser.go_to(&format!("{}/", shop.url)).await;
    // As fast as a hand is.
    browser.click("button", 2, Duration::from_millis(120)).await;
    let arrived = "location.pathname.startsWith('/orders/') && document.readyState === 'complete'";
    browser.wait_for(arrived).await;
    let seen = "[location.pathname, ...['h1', '#orders', '#posts'].map(id => document.querySelector(id).innerText)]";
    let expected = json!(["/orders/1", "Order 1", "1", "2"]);
    assert_eq!(browser.evaluate(seen).await, Ok(expected), "path, order, orders in all, forms received");

    browser.go_to(&format!("{}/", shop.url)).await;
    browser.click("button", 1, Duration::ZERO).await;
    browser.wait_for(arrived).await;
    let expected = json!(["/orders/2", "Order 2", "2", "3"]);
    assert_eq!(browser.evaluate(seen).await, Ok(expected), "another page is another order");
}
