//! The user who presses "Send" twice: a form, and one order of it.
//!
//! ```text
//! cargo run --example double_click
//! ```
//!
//! Open the address that it prints and press the button as often as you can: it takes two seconds to make an order. You
//! end at one order, and the page says how often the form came. Or, without a browser, send one form twice at a time:
//!
//! ```text
//! for i in 1 2; do curl -i http://127.0.0.1:3000/orders -d token=t-1 & done; wait
//! ```
//!
//! Each page has a token of its own, and the token is the key. Both presses are answered by the same redirect: the second
//! waits for the first, also where the browser has given the first up in its favour. No script is needed.
//!
//! Settings, from the environment: `ADDR` (`127.0.0.1:3000`) and `DELAY_MS` (2000), which an order takes.

use std::env;
use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{Html, IntoResponse, Redirect, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;
use tokio::time::sleep;
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller, key};

#[derive(Clone, Debug)]
struct Shop {
    counts: Arc<Counts>,
    delay: Duration,
}

#[derive(Debug, Default)]
struct Counts {
    /// How often the form was sent.
    posts: AtomicU64,
    orders: AtomicU64,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let delay = env::var("DELAY_MS").unwrap_or_else(|_| "2000".to_owned());
    let delay = delay.parse().map_err(|error| format!("DELAY_MS: {error}"))?;
    let shop = Shop { counts: Arc::default(), delay: Duration::from_millis(delay) };

    let ledger = Ledger::new(MemoryStore::new());
    // A browser goes where the answer says, so it has to be the first one's: that is the contract for an api. Nobody can
    // guess a token, and whoever has it may see what came of it.
    let once = IdempotencyLayer::api(&ledger, caller::shared())
        .key(key::form("token"))
        .require_key()
        // A user waits longer than a program before a 409 is better.
        .patience(Duration::from_secs(10));

    let orders = post(place_order).layer(once).layer(from_fn_with_state(shop.clone(), count));
    let app = Router::new().route("/", get(form)).route("/orders", orders).route("/orders/{number}", get(show_order));

    let addr = env::var("ADDR").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());
    let listener = TcpListener::bind(&addr).await.map_err(|error| format!("{addr}: {error}"))?;
    introduce(&listener.local_addr()?.to_string());
    let stop = async { drop(tokio::signal::ctrl_c().await) };
    axum::serve(listener, app.with_state(shop)).with_graceful_shutdown(stop).await?;
    ledger.drain(Duration::from_secs(10)).await?;
    Ok(())
}

/// A page with a token that no other page has. It is not stored, so that whoever comes back to it gets a new one.
async fn form() -> impl IntoResponse {
    let token = rand::random::<u128>();
    let body = format!(
        r#"<form method="post" action="/orders">
  <input type="hidden" name="token" value="{token:032x}">
  <button>Send</button>
</form>"#
    );
    ([(header::CACHE_CONTROL, "no-store")], page("An order", &body))
}

/// Makes an order and sends the browser to it, so that reloading that page sends no form.
async fn place_order(State(shop): State<Shop>) -> Redirect {
    let number = shop.counts.orders.fetch_add(1, Ordering::SeqCst) + 1;
    // A payment, a mail. A browser that gives up meanwhile does not undo the order.
    sleep(shop.delay).await;
    Redirect::to(&format!("/orders/{number}"))
}

async fn show_order(State(shop): State<Shop>, Path(number): Path<u64>) -> Response {
    let (orders, posts) = (shop.counts.orders.load(Ordering::SeqCst), shop.counts.posts.load(Ordering::SeqCst));
    if number == 0 || number > orders {
        return (StatusCode::NOT_FOUND, page("No such order", "")).into_response();
    }
    let body = format!(
        r#"<p>Orders in all: <b id="orders">{orders}</b>. Forms received: <b id="posts">{posts}</b>.</p>
<p><a href="/">Another order</a></p>"#
    );
    page(&format!("Order {number}"), &body).into_response()
}

/// Counts the forms as they come in, before the layer.
async fn count(State(shop): State<Shop>, request: Request, next: Next) -> Response {
    shop.counts.posts.fetch_add(1, Ordering::SeqCst);
    next.run(request).await
}

/// Nothing that a user has sent goes in here.
fn page(title: &str, body: &str) -> Html<String> {
    Html(format!("<!DOCTYPE html>\n<html lang=\"en\">\n<title>{title}</title>\n<h1>{title}</h1>\n{body}\n</html>\n"))
}

#[allow(clippy::print_stdout, reason = "it talks to whoever started it")]
fn introduce(addr: &str) {
    println!("The shop is open at http://{addr} (press Send twice)");
}
