//! H: whose key it is, and what nobody else learns.

use http::Request;
use tower_idempotency::key::{header, json};
use tower_idempotency::{IdempotencyLayer, Ledger, MemoryStore, caller};

use crate::common::app::{App, Body, answer, body, counting, event, order};
use crate::common::stores::{Step, Stores};

on_every_store! {
    h01_tenants_do_not_share_keys
    h03_a_scope_that_cannot_be_found_is_a_500_and_no_claim
    h04_callers_do_not_share_outcomes
    h06_no_tenant_can_make_anothers_key
    h08_a_forged_request_does_not_burn_the_id_it_forges
    h12_an_id_of_any_bytes_is_a_key_of_fixed_length
}

fn webhook(ledger: &Ledger) -> IdempotencyLayer {
    IdempotencyLayer::webhook(ledger, header("X-Id"))
}

fn by(name: &'static str, value: &str) -> Request<Body> {
    let mut request = order("k", "1");
    request.headers_mut().insert(name, value.parse().unwrap());
    request
}

async fn h01_tenants_do_not_share_keys(stores: Stores) {
    let layer = IdempotencyLayer::api(&stores.ledger(), caller::shared())
        .scope(|head| head.headers.get("x-tenant").map(|tenant| tenant.as_bytes().to_vec()));
    let app = counting(&layer, 201);
    for (tenant, run) in [("a", "run 1"), ("b", "run 2"), ("a", "run 1"), ("b", "run 2")] {
        assert_eq!(app.send(by("x-tenant", tenant)).await.body, run);
    }
    assert_eq!(app.send(order("k", "1")).await.body, "run 3", "no tenant is another");
}

async fn h03_a_scope_that_cannot_be_found_is_a_500_and_no_claim(stores: Stores) {
    let layer = IdempotencyLayer::api(&stores.ledger(), caller::shared())
        .try_scope(|_| Err::<Option<String>, _>("no tenant is known at the moment"));
    let app = counting(&layer, 201);
    let refused = app.send(order("k", "1")).await;
    assert_eq!((refused.status.as_u16(), refused.code().as_deref()), (500, Some("scope_unknown")));
    assert_eq!((app.runs(), stores.calls(Step::Claim)), (0, 0));
    let layer = layer.try_scope(|_| Ok::<_, std::io::Error>(Some("tenant")));
    assert_eq!(counting(&layer, 201).send(order("k", "1")).await.status, 201);
}

async fn h04_callers_do_not_share_outcomes(stores: Stores) {
    let app = counting(&IdempotencyLayer::api(&stores.ledger(), caller::authorization()), 201);
    for (token, run) in [("Bearer a", "run 1"), ("Bearer b", "run 2"), ("Bearer a", "run 1")] {
        assert_eq!(app.send(by("authorization", token)).await.body, run);
    }
}

async fn h06_no_tenant_can_make_anothers_key(stores: Stores) {
    let layer =
        webhook(&stores.ledger()).scope(|head| head.headers.get("x-tenant").map(|tenant| tenant.as_bytes().to_vec()));
    let app = counting(&layer, 200);
    let send = |tenant: &str, id: &str| {
        let mut request = event(id);
        request.headers_mut().insert("x-tenant", tenant.parse().unwrap());
        app.send(request)
    };
    assert_eq!(send("a:", "b").await.body, "run 1");
    assert_eq!(send("a", ":b").await.body, "run 2");
}

async fn h08_a_forged_request_does_not_burn_the_id_it_forges(stores: Stores) {
    let app = App::new(&webhook(&stores.ledger()), |request, _| async move {
        let is_genuine = request.headers().get("x-signature").is_some_and(|signature| signature == "genuine");
        answer(if is_genuine { 200 } else { 401 }, "")
    });
    let signed = |signature: &str| {
        let mut request = event("e");
        request.headers_mut().insert("x-signature", signature.parse().unwrap());
        app.send(request)
    };
    assert_eq!(signed("forged").await.status, 401);
    assert_eq!(signed("genuine").await.status, 200);
    assert!(signed("genuine").await.is_replayed());
    assert_eq!(app.runs(), 2);
}

async fn h12_an_id_of_any_bytes_is_a_key_of_fixed_length(stores: Stores) {
    let layer = IdempotencyLayer::webhook(&stores.ledger(), json("$.id"));
    let app = counting(&layer, 200);
    let text = r#"{"id":"a\r\nDEL x"}"#;
    let send = || app.send(Request::post("/hooks").body(body(text)).unwrap());
    send().await;
    assert!(send().await.is_replayed());
    assert_eq!(app.runs(), 1);
    let (head, ()) = Request::post("/hooks").body(()).unwrap().into_parts();
    assert_eq!(layer.key_of(&head, &text.into()).unwrap().to_string().len(), 32);
}

#[test]
#[should_panic(expected = "at least 16 bytes")]
fn a_secret_that_could_be_guessed_is_refused() {
    let _ = webhook(&Ledger::new(MemoryStore::new())).secret("short");
}
