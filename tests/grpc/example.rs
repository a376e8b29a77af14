//! The example says what its docs say.

use tokio::process::Command;

#[tokio::test]
async fn a_payment_is_called_twice_and_charged_once() {
    let output = Command::from(crate::common::example("grpc")).output().await.unwrap();
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{told}");
    assert_eq!(told.matches("the handler charges 500 cents").count(), 1, "{told}");
    for told_too in [
        "receipt 1, replayed: false",
        "receipt 1, replayed: true",
        "InvalidArgument: the idempotency key was used with another payload (KEY_REUSED)",
        "InvalidArgument: the idempotency key is missing (KEY_MISSING)",
        "charged in all: 500 cents",
    ] {
        assert!(told.contains(told_too), "{told}");
    }
}
