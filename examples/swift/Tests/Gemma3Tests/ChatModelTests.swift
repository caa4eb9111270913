import Foundation
import XCTest

@testable import Gemma3

@MainActor
final class ChatModelTests: XCTestCase {
    func testTurnsGrowAndStopKeepsWhatHasCome() async throws {
        let chat = ChatModel()
        XCTAssertEqual(chat.state, .empty)
        await chat.load("demo")
        XCTAssertEqual(chat.state, .ready)
        chat.options = .greedy
        chat.send("What shape is this?", pictures: [try picture("heart")])
        XCTAssertEqual(chat.state, .answering)
        try await wait(for: { chat.state == .ready })
        XCTAssertEqual(chat.turns.map(\.text), ["What shape is this?", "heart"])
        XCTAssertEqual(chat.turns.map(\.fromUser), [true, false])

        chat.options = .long(8_000)
        chat.send("And what colour is it?")
        try await wait(for: { chat.turns[3].text != "" })
        chat.stop()
        try await wait(for: { chat.state == .ready })
        XCTAssertEqual(chat.turns.count, 4)
        XCTAssertNil(chat.reading)
        await chat.close()
        XCTAssertEqual(chat.state, .empty)
        XCTAssertTrue(chat.turns.isEmpty)
    }

    func testATurnThatFailsWasNotSaid() async throws {
        let chat = ChatModel()
        await chat.load("demo")
        chat.send("What is this?", pictures: [Data("no picture".utf8)])
        try await wait(for: { chat.state != .answering })
        guard case .failed(let words) = chat.state else { return XCTFail("\(chat.state)") }
        XCTAssertFalse(words.isEmpty)
        XCTAssertTrue(chat.turns.isEmpty)
        await chat.close()
    }

    func testAModelThatIsNotThereIsASentence() async {
        let chat = ChatModel()
        await chat.load("no-such-model-anywhere")
        guard case .failed(let words) = chat.state else { return XCTFail("\(chat.state)") }
        XCTAssertTrue(words.contains("no-such-model-anywhere"), words)
    }

    private func wait(for condition: () -> Bool) async throws {
        let end = Date().addingTimeInterval(60)
        while !condition() {
            XCTAssertLessThan(Date(), end)
            if Date() > end { return }
            try await Task.sleep(nanoseconds: 5_000_000)
        }
    }
}
