//! Other rules for other methods, in one layer around a whole server, and a layer for a single service.

use tokio::net::TcpListener;
use tonic::service::LayerExt as _;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tower_idempotency::{IdempotencyLayer, caller, key};

use crate::bank::{Bank, CHARGE, Served, api, charge, keyed, ledger};
use crate::payments::TotalRequest;
use crate::payments::payments_client::PaymentsClient;
use crate::payments::payments_server::PaymentsServer;

const TOTAL: &str = "/payments.v1.Payments/Total";

#[tokio::test]
async fn each_method_and_each_service_has_its_rule() {
    let ledger = ledger();
    let bare = IdempotencyLayer::api(&ledger, caller::shared());
    let by_field = bare.clone().unary(CHARGE).key(key::protobuf([1]));
    let of_service = bare.clone().unary(TOTAL).key(key::metadata("other")).require_key();
    let layer = bare.for_path(CHARGE, by_field).for_path("/payments.v1.Payments/", of_service);
    let served = Served::by(layer).await;
    let mut client = served.client().await;
    // One by the id in the message, whatever the metadata says; the other by that alone.
    client.charge(charge("k-1", 500)).await.unwrap();
    client.charge(charge("k-2", 500)).await.unwrap();
    assert_eq!(served.bank.runs(), 1);
    client.total(keyed("k-1", TotalRequest::default())).await.unwrap_err();
    let total = || {
        let mut request = keyed("k-1", TotalRequest::default());
        request.metadata_mut().insert("other", "o-1".parse().unwrap());
        request
    };
    client.total(total()).await.unwrap();
    client.total(total()).await.unwrap();
    assert_eq!(served.bank.runs(), 2);
}

#[tokio::test]
async fn a_layer_that_is_switched_off_is_off_for_every_path() {
    let bare = IdempotencyLayer::api(&ledger(), caller::shared());
    let served = Served::by(bare.clone().for_path(CHARGE, bare.unary(CHARGE)).enabled(false)).await;
    let mut client = served.client().await;
    for _ in 0..2 {
        client.charge(charge("k", 500)).await.unwrap();
    }
    assert_eq!(served.bank.runs(), 2);
}

#[tokio::test]
async fn a_single_service_has_a_layer_of_its_own() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let bank = Bank::default();
    let service = api(&ledger()).named_layer(PaymentsServer::new(bank.clone()));
    let server = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
    let server = tokio::spawn(server);
    let mut client = PaymentsClient::connect(format!("http://{addr}")).await.unwrap();
    let first = client.charge(charge("k", 500)).await.unwrap();
    let again = client.charge(charge("k", 500)).await.unwrap();
    assert_eq!(first.get_ref(), again.get_ref());
    assert_eq!(bank.runs(), 1);
    server.abort();
}

#[tokio::test]
async fn the_rule_of_a_path_names_its_keys_too() {
    let ledger = ledger();
    let bare = IdempotencyLayer::api(&ledger, caller::shared());
    let layer = bare.clone().for_path(CHARGE, bare.unary(CHARGE).key(key::metadata("id")));
    let request = http::Request::post(CHARGE).header("content-type", "application/grpc").header("id", "k");
    let (head, ()) = request.body(()).unwrap().into_parts();
    let key = layer.key_of(&head, &bytes::Bytes::new()).unwrap();
    let served = Served::by(layer).await;
    let mut request = charge("", 500);
    request.metadata_mut().insert("id", "k".parse().unwrap());
    served.client().await.charge(request).await.unwrap();
    assert!(ledger.lookup(&key).await.unwrap().is_some());
}
