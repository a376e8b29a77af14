//! Bodies that are announced, too large, cut short, or not what they claim to be.

use http_body_util::BodyExt as _;
use tower_idempotency::{Attempt, IdempotencyLayer};

use crate::common::app::answer;
use crate::peers::{Client, Server, api, head, post, webhook};

const LIMIT: usize = 64;
const MIB: usize = 1 << 20;

/// Says how much it has read, or 417 where that is not to be.
async fn reading(layer: &IdempotencyLayer) -> Server {
    Server::start(layer, |request, run| async move {
        if request.headers().contains_key("x-unread") {
            return answer(417, "unread");
        }
        let number = request.extensions().get::<Attempt>().map_or(0, Attempt::number);
        let length = request.into_body().collect().await?.to_bytes().len();
        answer(200, format!("run {run}, attempt {number}: {length} bytes"))
    })
    .await
}

fn announcing(key: &str, length: usize, lines: &str) -> String {
    format!("{}content-length: {length}\r\n{lines}\r\n", head("POST", key))
}

const EXPECT: &str = "expect: 100-continue\r\n";
const CHUNKED: &str = "transfer-encoding: chunked\r\n";

#[tokio::test]
async fn who_asks_before_sending_too_much_is_refused_and_not_told_to_send() {
    for layer in [webhook(), api()] {
        let server = reading(&layer.max_request_body(LIMIT)).await;
        for expect in [EXPECT, "Expect: 100-Continue\r\n"] {
            let mut client = server.connect().await;
            client.send(announcing("k", LIMIT + 1, expect)).await;
            let told = client.told().await;
            assert_eq!((told.status, told.code().as_str()), (413, "body_too_large"));
            assert!(client.is_closed().await, "what was announced could come all the same");
        }
        let told = server.connect().await.ask("k", "", "small").await;
        assert_eq!(told.text(), "run 1, attempt 1: 5 bytes", "nothing was claimed");
    }
}

#[tokio::test]
async fn who_asks_before_sending_enough_is_told_to_send_and_answered() {
    for layer in [webhook(), api()] {
        let server = reading(&layer.max_request_body(LIMIT)).await;
        let mut client = server.connect().await;
        for replayed in [false, true] {
            client.send(announcing("k", LIMIT, EXPECT)).await;
            assert_eq!(client.told().await.status, 100);
            client.send([b'x'; LIMIT]).await;
            let told = client.told().await;
            assert_eq!((told.text(), told.is_replayed()), ("run 1, attempt 1: 64 bytes", replayed));
        }
    }
}

#[tokio::test]
async fn who_asks_without_a_key_is_answered_by_the_handler() {
    let server = reading(&webhook().max_request_body(LIMIT)).await;
    let mut client = server.connect().await;
    let keyless = format!("POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n{EXPECT}");
    client.send(format!("{keyless}\r\n")).await;
    assert_eq!(client.told().await.status, 100);
    client.send([b'x'; 1000]).await;
    assert_eq!(client.told().await.text(), "run 1, attempt 0: 1000 bytes");
    client.send(format!("{keyless}x-unread: 1\r\n\r\n")).await;
    assert_eq!(client.told().await.status, 417, "nobody has read what the handler does not");
}

#[tokio::test]
async fn who_asks_before_sending_nobody_knows_how_much_is_counted() {
    let server = reading(&webhook().max_request_body(LIMIT)).await;
    let mut client = server.connect().await;
    client.send(format!("{}{CHUNKED}{EXPECT}\r\n", head("POST", "k"))).await;
    assert_eq!(client.told().await.status, 100);
    client.send(format!("41\r\n{}\r\n0\r\n\r\n", "x".repeat(LIMIT + 1))).await;
    assert_eq!((client.told().await.status, server.runs()), (413, 0));
}

/// More than the buffers of a connection hold, so that it can be written only if it is read, and less than five bodies
/// of the largest size.
const MUCH: usize = 9 * MIB;

#[tokio::test]
async fn who_sends_all_before_reading_gets_to_read_the_refusal() {
    let server = reading(&webhook()).await;
    // An expectation that is none is as good as no expectation, and HTTP/1.0 knew of none.
    let heads = ["", "expect: something else\r\n"].map(|lines| announcing("k", MUCH, lines));
    let of_http_1_0 = announcing("k", MUCH, EXPECT).replace("HTTP/1.1", "HTTP/1.0");
    for head in heads.into_iter().chain([of_http_1_0]) {
        let mut client = server.connect().await;
        client.send(head.as_bytes()).await;
        let sent = client.try_send(vec![b'x'; MUCH]).await;
        assert!(sent.is_ok(), "{sent:?} after {head}");
        assert_eq!(client.told().await.code(), "body_too_large", "{head}");
    }
    assert_eq!(server.runs(), 0);
}

fn chunks(count: usize) -> String {
    format!("10\r\n{}\r\n", "x".repeat(16)).repeat(count)
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_costs_its_request_and_not_the_connection() {
    for layer in [webhook(), api()] {
        let server = reading(&layer.max_request_body(LIMIT)).await;
        let mut client = server.connect().await;
        let chunked = |chunks: &str| format!("{}{CHUNKED}\r\n{chunks}0\r\n\r\n", head("POST", "k"));
        client.send(chunked(&chunks(8))).await;
        let told = client.told().await;
        assert_eq!((told.status, told.code().as_str(), server.runs()), (413, "body_too_large", 0));
        client.send(chunked(&chunks(4))).await;
        assert_eq!(client.told().await.text(), "run 1, attempt 1: 64 bytes");
    }
}

#[tokio::test]
async fn a_chunked_body_without_an_end_is_refused_and_cut_off() {
    let server = reading(&webhook().max_request_body(LIMIT)).await;
    let mut client = server.connect().await;
    client.send(format!("{}{CHUNKED}\r\n", head("POST", "k"))).await;
    // No one reads it to its end: the server hangs up, some time.
    while client.try_send(chunks(1024)).await.is_ok() {}
    assert_eq!(server.runs(), 0);
    assert_eq!(server.connect().await.ask("k", "", "").await.text(), "run 1, attempt 1: 0 bytes");
}

#[tokio::test]
async fn e06_a_length_that_is_none_is_refused_and_runs_nothing() {
    for layer in [webhook(), api()] {
        let server = reading(&layer.max_request_body(1024)).await;
        for length in ["-1", "abc", "+5", "5 5", "99999999999999999999999", "5\r\ncontent-length: 6"] {
            let mut client = server.connect().await;
            client.send(format!("{}content-length: {length}\r\n\r\nhello", head("POST", "k"))).await;
            assert_eq!(client.told().await.status, 400, "{length}");
            assert!(client.is_closed().await);
        }
        assert_eq!(server.runs(), 0);
        assert_eq!(server.connect().await.ask("k", "", "hello").await.text(), "run 1, attempt 1: 5 bytes");
    }
}

#[tokio::test]
async fn e10_half_a_body_runs_nothing_and_leaves_no_record() {
    for layer in [webhook(), api()] {
        let server = reading(&layer).await;
        for goes in [true, false] {
            let mut client = server.connect().await;
            client.send(announcing("k", 100, "")).await;
            client.send([b'x'; 50]).await;
            if goes {
                drop(client);
            } else {
                client.half_close().await;
                let told = client.try_told().await.map(|told| told.status);
                assert!(told.as_ref().is_ok_and(|status| *status == 400) || told.is_err(), "{told:?}");
            }
        }
        let whole = "x".repeat(100);
        assert_eq!(server.connect().await.ask("k", "", &whole).await.text(), "run 1, attempt 1: 100 bytes");
        assert!(server.connect().await.ask("k", "", &whole).await.is_replayed());
        assert_eq!(server.runs(), 1);
    }
}

#[tokio::test]
async fn a_body_of_both_lengths_is_read_in_one_way() {
    // RFC 9112 §6.3: the chunks count. What the length would leave over must not become a request.
    let server = reading(&webhook()).await;
    let mut client: Client = server.connect().await;
    let inner = post("smuggled", "", "");
    let chunked = format!("{:x}\r\n{inner}\r\n0\r\n\r\n", inner.len());
    client.send(format!("{}content-length: 4\r\n{CHUNKED}\r\n{chunked}", head("POST", "k"))).await;
    let told = client.told().await;
    assert!(told.status == 400 || told.text() == format!("run 1, attempt 1: {} bytes", inner.len()), "{told:?}");
    assert!(server.runs() <= 1);
    assert!(!server.connect().await.ask("smuggled", "", "").await.is_replayed());
}
